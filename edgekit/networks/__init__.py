"""The user's own module, from the command line.

`user_code.py` executes the user's file, `source.py` makes the module and its example, `data.py`
reads calibration data, `codes.py` files of codes.
"""
