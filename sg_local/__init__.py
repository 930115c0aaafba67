"""A GGUF model, an instruction and up to three examples become a better GGUF (SELF-GUIDE, arXiv 2407.12874).

    >>> import sg_local
    >>> result = sg_local.run("support-inbox", model="smollm2-135m", settings=sg_local.Settings(n_inputs=160))
    >>> result.scores["base_few_shot"], result.scores["tuned_merged"]
    (0.34, 0.71)
    >>> sg_local.predict(["Where is my parcel?"], model=result.model)
    ['delivery']

`run`, `predict` and `write_report` are what the commands `run`, `predict` and `report` call. They show their progress
on stderr. What you can do something about is an `SgLocalError`: an `InputError` where the call or a file is wrong.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sg_local.answers import predict
    from sg_local.errors import InputError, SgLocalError, WorseThanBase
    from sg_local.report.page import write_report
    from sg_local.runs.loop import Result, run
    from sg_local.settings import Settings
    from sg_local.task import Example, Task, load_task
    from sg_local.task_files.row_files import RowFile

__all__ = [
    "Example",
    "InputError",
    "Result",
    "RowFile",
    "Settings",
    "SgLocalError",
    "Task",
    "WorseThanBase",
    "load_task",
    "predict",
    "run",
    "write_report",
]

# Where a name is; its module is imported when the name is used, so that `import sg_local` costs nothing.
_MODULES = {
    **dict.fromkeys(("InputError", "SgLocalError", "WorseThanBase"), "errors"),
    **dict.fromkeys(("Example", "Task", "load_task"), "task"),
    **dict.fromkeys(("Result", "run"), "runs.loop"),
    "RowFile": "task_files.row_files",
    "Settings": "settings",
    "predict": "answers",
    "write_report": "report.page",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
