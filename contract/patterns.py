"""The patterns of text fields, and what each one demands in words: a regular expression is no error message."""

from trainyard.contract.scopes import NAME

TOKEN_NAME = f"^{NAME}$"
FILE_STEM = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
SOURCE_NAME = r"^[a-z0-9_.-]{1,64}$"
TASK_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
DEVICE = r"^(auto|cpu|cuda(:\d{1,3})?)$"
SLURM_WORD = r"^[A-Za-z0-9_.][A-Za-z0-9_.,:+-]{0,99}$"
SLURM_OPTION = r"^--[a-z][a-z-]{1,40}(=[A-Za-z0-9_.,:%@/+*&|()\[\]-]{1,200})?$"
SLURM_CONSTRAINT = r"^[A-Za-z0-9_.,:&|*()\[\]-]{1,200}$"
WITHOUT_NUL = r"^[^\x00]*$"
ONE_LINE = r"^[^\x00\r\n]+$"
EVALUATION_ID = r"^[a-z0-9_]+$"
STEP_OR_LATEST = r"^([0-9]{1,15}|latest)$"

PATTERN_MESSAGES = {
    TOKEN_NAME: "must be 1 to 64 letters (a-z), digits, dots, _ or -, and begin with a letter or digit",
    FILE_STEM: "must be 1 to 100 letters (a-z), digits, dots, _ or -, and begin with a letter or digit",
    SOURCE_NAME: "must be 1 to 64 small letters (a-z), digits, dots, _ or -",
    TASK_NAME: "must be 1 to 64 letters (a-z), digits, dots, _ or -",
    DEVICE: 'must be "auto", "cpu", "cuda", or one GPU such as "cuda:0"',
    SLURM_WORD: "must be a name of Slurm: 1 to 100 letters (a-z), digits, and _ . , : + -",
    SLURM_OPTION: "must be one option of sbatch, such as --mem=64G",
    SLURM_CONSTRAINT: "must be a constraint of Slurm, such as a100|h100, without spaces",
    WITHOUT_NUL: "must not contain a NUL character",
    ONE_LINE: "must be one line",
    EVALUATION_ID: "must be the id of an evaluation: small letters (a-z), digits and _",
    STEP_OR_LATEST: "must be a step, or latest",
}
"""Pattern -> the second half of a sentence that begins with the field. A test covers every pattern of the API."""
