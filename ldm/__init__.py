"""MedSoft-Diffusion: the library behind the commands. Importing it does nothing and needs no torch."""
