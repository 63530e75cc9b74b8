"""What differs between backbones: one object per family, and the shapes of a row.

Other rooms import: encoder_decoder, family, modes, packed, siblings, table.
"""
