"""What commands that run in several processes do on the command line before they begin."""

from phoque.console import console
from phoque.distributed.launch import Launch, enter_launch, run_on_gpus
from phoque.errors import PhoqueError
from phoque.inputs import check_inputs
from phoque.settings.fields import CommandSettings
from phoque.settings.probe import ProbeSettings


def launch_probe(s: ProbeSettings, dry_run: bool) -> Launch | None:
    """What the launcher of this process says, if there is one; with --gpus, this command is run on each GPU first."""
    launch, starts_others = enter_launch(console), bool(s.gpus) and not dry_run
    if launch or starts_others:  # one process alone checks them later
        check_inputs_once(s, launch)
    if starts_others and not launch:
        run_on_gpus(s.gpus)
    return launch


def check_inputs_once(s: CommandSettings, launch: Launch | None) -> None:
    """Check the inputs; of several processes on a machine, which find the same, the first one reports it."""
    try:
        check_inputs(s)
    except PhoqueError as error:
        if launch and launch.local_rank:
            raise SystemExit(error.code) from None
        raise
