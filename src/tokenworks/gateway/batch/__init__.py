"""Files and batches: OpenAI's Batch API, durable, worked off by the scheduler's class `batch`."""

from tokenworks.gateway.batch.inside import Inside
from tokenworks.gateway.batch.routes import routes
from tokenworks.gateway.batch.service import BatchService, Summary
from tokenworks.gateway.batch.settings import BatchSettings

__all__ = ["BatchService", "BatchSettings", "Inside", "Summary", "routes"]
