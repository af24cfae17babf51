"""What a model is: its sites, its chain of blocks, how it is called, the products it is made of, which part is in
memory.
"""
