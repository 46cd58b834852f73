"""`mlx-adapters methods`."""

import typer

__all__ = ["command"]


def command() -> None:
    """List the adapter methods with their fields, for --method and --set."""
    import dataclasses

    from mlx_adapters import methods

    for name in methods.names():
        module = methods.get(name)
        typer.echo(f"{name}: {module.__doc__.strip().splitlines()[0]}")
        for field in dataclasses.fields(module.Config):
            typer.echo(f"    {field.name}={field.default}  {field.metadata['help']}")
