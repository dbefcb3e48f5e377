"""The command line `tl-clt`: one file a group of commands."""

from tl_clt.cli.interruption import end_interrupted

try:
    from tl_clt.cli.app import app, list_transcoders
    from tl_clt.cli.benchmark import benchmark
    from tl_clt.cli.exchange import export, import_graph
    from tl_clt.cli.features import features
    from tl_clt.cli.finetune import finetune
    from tl_clt.cli.measure import evaluate, tradeoff
    from tl_clt.cli.prompts import demo, intervene, trace
    from tl_clt.cli.train import train
    from tl_clt.cli.view import view
except KeyboardInterrupt:
    end_interrupted()

__all__ = [
    "app",
    "benchmark",
    "demo",
    "evaluate",
    "export",
    "features",
    "finetune",
    "import_graph",
    "intervene",
    "list_transcoders",
    "trace",
    "tradeoff",
    "train",
    "view",
]
