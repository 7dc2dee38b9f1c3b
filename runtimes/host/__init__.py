"""This machine and its processes: GPU, environment, command lines, background processes, memory."""
