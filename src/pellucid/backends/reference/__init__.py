"""The spec executed in clear numpy: the oracle for every other backend, and the place to read how inference works."""
