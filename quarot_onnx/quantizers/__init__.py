# SPDX-License-Identifier: Apache-2.0
"""Weight quantizers: arrays in, arrays out, no graph.

`rtn` is the common form: symmetric, a scale per output channel. `grid` has the others: zero points
and groups. `gptq` rounds a row of inputs at a time and makes up for its error in the rest.
"""
