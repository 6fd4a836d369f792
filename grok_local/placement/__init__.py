"""Where weights go: pure arithmetic from options and a machine to a plan and a forecast."""
