"""What the server of tests/children.py has imported when it forks: whatever the commands need of torch and others.

What is imported is no garbage: neither the server nor its children search it for any.
"""

import gc
import importlib

gc.disable()
for name in ("open_clip", "matplotlib.figure", "sklearn.metrics"):
    importlib.import_module(name)
for name in ("training", "inference", "classifier"):
    importlib.import_module(f"ldm.{name}.run")
gc.freeze()
gc.enable()
