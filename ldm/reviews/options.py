"""What the flags of reviews have in common. Nothing heavy is imported here."""

REVIEW_HELP = (  # of every command that leaves rejected images out
    "review.csv of medsoft review about the synthetic images (may be given several times): what any reviewer rejected "
    "is left out; what was flagged, or judged by nobody, stays and is counted"
)
