"""The subcommands of ``cute-attn``: one module each.

A module has ``add_arguments(parser)`` and ``run(arguments)``, which returns the exit status.
"""
