"""Engines behind one protocol, generation, benchmarks, evaluation and the prediction of `fit`.

`model_files.py` finds what a path stands for, `open_model.py` opens it with its tokenizer.
"""
