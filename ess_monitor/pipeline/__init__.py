"""One sampled step, from due to exported: trigger, queue, schedule, results."""
