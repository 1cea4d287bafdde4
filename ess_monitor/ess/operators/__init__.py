"""The linear operators y = T u of sequence mixers, one family a file."""
