"""stub until the page is there"""


def page(record, shown):
    from powermc.errors import ModelError

    raise ModelError("not there yet")
