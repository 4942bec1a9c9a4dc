"""The subcommands of ``cute-attn``: one module each, with ``add_arguments(parser)`` and ``run(arguments) -> exit status``."""
