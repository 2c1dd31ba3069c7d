"""Third-party network modules of sd-scripts' face, such as LyCORIS: all asking what they can do is in this file.

The face is described in docs/networks.md; networks.lora has it too, so that training knows only this file.
"""
