"""Training jobs: uploaded files, a queue of jobs, and the process that trains each of them. Knows no HTTP."""

from loraserve.jobs.files import FileStore, StoredFile
from loraserve.jobs.job import Job
from loraserve.jobs.queue import JobQueue

__all__ = ["FileStore", "Job", "JobQueue", "StoredFile"]
