import typer
def add_to(app): pass
