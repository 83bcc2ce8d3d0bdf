"""llama.cpp, through llama-cpp-python.

`facts.py` reads what a file says of itself, `checks.py` refuses what llama.cpp would not survive,
`library.py` loads it, `decoder.py` runs it, `tokenizer.py` is the tokenizer inside a file.
"""
