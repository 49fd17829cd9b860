"""What makes the optimizer feel at home in training frameworks.

Each module imports its framework, and nothing else in ``cg_optim`` does:

* :mod:`cg_optim.integrations.transformers`: learning rate and other settings from
  ``TrainingArguments``; diagnostics in the Trainer's logs.
* :mod:`cg_optim.integrations.lightning`: diagnostics in Lightning's loggers.
"""

from cg_optim.integrations.wrappers import unwrap

__all__ = ["unwrap"]
