"""What the server of tests/children.py has imported when it forks: whatever the commands need of torch and others.

What is imported is no garbage: neither the server nor its children search it for any.
"""

import gc
import importlib

gc.disable()
for name in ("open_clip", "matplotlib.figure", "sklearn.metrics", "torch.utils.tensorboard", "torch.distributed.run"):
    importlib.import_module(name)
for name in ("bert", "clip"):
    importlib.import_module(f"transformers.models.{name}.modeling_{name}")
for name in (
    "training.run",
    "inference.run",
    "classifier.run",
    "evaluation.run",
    "evaluation.check",
    "workflow.study_run",
):
    importlib.import_module(f"ldm.{name}")
importlib.import_module("ldm.core.distributed").fabric_class()
importlib.import_module("ldm.networks.text_encoder").clip_tokenizer()
gc.freeze()
gc.enable()
