"""`edgekit devices`: the known devices and this machine."""

import click

from edgekit.commands._completion import devices


@click.command("devices", short_help="List the known devices and probe this machine.")
@click.argument("name", required=False, shell_complete=devices)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the known devices and this machine ("local"), or the facts of one."""
    from edgekit.common.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.devices.report import describe_devices

        text = describe_devices(name, as_json)
    click.echo(text)
