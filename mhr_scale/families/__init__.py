"""What differs between backbones: one object per family, and the shapes of a row.

Other rooms import: branched, compiled, encoder_decoder, family, fused, linear_modules,
linear_names, modes, packed, sending, sequences, siblings, stored_names, table.
"""
