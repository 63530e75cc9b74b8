"""The paper's claims at small scale: what is run, how it is compared, what comes out.

`suites` says which methods there are, `plan` which units of work, `pool` runs them, `rates` picks
learning rates, `results` reads files into measures, `claims` compares them, `tables` prints.
"""
