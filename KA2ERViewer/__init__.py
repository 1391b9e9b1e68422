"""The browser viewer: Slicer's own scene and views in a web page, driven by the logic of the Slicer module.

    browser  <->  server  <->  page (one process per tab)  ->  engine (one for all)
                  |            |
                  aiohttp      slicer-core, trame-slicer, SlicerKA2ERLib.PromptLogic

`server` is all that listens on the network: it lets a browser in, gives each tab a process of its own and passes on
what the two say to each other. `page` is such a process. Read `page/app.py` first.

An application on top of the library: `KA2ERSegment` imports nothing from here but for the command `ka2ersegment view`.
"""
