"""Block-sparse softmax attention: one contract (`api.py`), several implementations."""
