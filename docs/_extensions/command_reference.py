"""The directive ``command``: what a subcommand of ``vmm-fast`` takes, from its parser."""

import argparse

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from vmm_fast.cli import _parser


class CommandReference(SphinxDirective):
    """Describe one subcommand, with its usage, arguments and options."""

    required_arguments = 1

    def run(self):
        """Return the description as nodes."""
        subcommands = next(
            action
            for action in _parser()._actions
            if isinstance(action, argparse._SubParsersAction)
        )
        parser = subcommands.choices[self.arguments[0]]
        found = [nodes.paragraph(text=parser.description)]
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
        found.append(nodes.literal_block(usage, usage, language="text", classes=["usage"]))
        options = nodes.definition_list()
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            value = action.metavar or (
                "{" + ",".join(action.choices) + "}" if action.choices else ""
            )
            names = action.option_strings or [value]
            term = ", ".join(names) + (f" {value}" if action.option_strings and value else "")
            text = (action.help or "") % {"default": action.default, "prog": parser.prog}
            options += nodes.definition_list_item(
                "",
                nodes.term("", "", nodes.literal(text=term)),
                nodes.definition("", nodes.paragraph(text=text)),
            )
        found.append(options)
        if parser.epilog:
            found.append(nodes.literal_block(parser.epilog, parser.epilog, language="text"))
        return found


def setup(app):
    """Add the directive."""
    app.add_directive("command", CommandReference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
