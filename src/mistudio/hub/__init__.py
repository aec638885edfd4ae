"""Released SAEs: which there are (`index`), what they are called (`names`), and how to get and read them.

Nothing is imported here, so that looking something up in the index does not load torch: import the submodule you need.
"""
