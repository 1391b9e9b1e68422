"""The engine: one program that holds the model and the sessions, and the clients that talk to it.

`client`, `process` and `wire` need no torch: they are what Slicer imports. `app`, `nninteractive`, `serve` and
`workplaces` are the program itself.
"""
