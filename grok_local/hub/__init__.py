"""Fetches the release: its tensors from the Hugging Face hub, its tokenizer from the release's git repository.

huggingface-hub lists the files, knows token and mirror, and opens the connections. What it does not do is go on with
half a file after the program was stopped: so a file here grows in FOLDER/.pull, and only gets its own name when its
size and hash are those of the listing.
"""
