"""From files on a disk to batches of tokens, through documents, corpus, split, packing and batches, in that order."""
