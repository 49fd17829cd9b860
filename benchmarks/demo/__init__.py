"""The demo: CGLoRAOptimizer beside AdamW on two small but real fine-tunings.

``python -m benchmarks.demo`` runs it; ``settings`` has the learning rates and budgets,
``parts`` the two tasks, ``training`` the loop, ``report`` the table, the picture and
the JSON file.
"""
