"""What differs between backbones: one object per family, and the table of them."""
