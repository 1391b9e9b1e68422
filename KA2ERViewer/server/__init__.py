"""All that listens on the network: lets browsers in, and gives each tab a process. No Slicer, no trame."""
