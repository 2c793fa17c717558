"""What both probes do on the command line before they begin."""

from phoque.console import console
from phoque.distributed.launch import Launch, enter_launch, run_on_gpus
from phoque.inputs import check_inputs
from phoque.settings.probe import ProbeSettings


def launch_probe(s: ProbeSettings, dry_run: bool) -> Launch | None:
    """What the launcher of this process says, if there is one; with --gpus, this command is run on each GPU first."""
    launch = enter_launch(console)
    if s.gpus and not launch and not dry_run:
        check_inputs(s)  # before there are several processes, each of which would find the same
        run_on_gpus(s.gpus)
    return launch
