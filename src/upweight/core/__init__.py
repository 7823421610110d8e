"""What every room shares: records, batches, interfaces and identities. Imports nothing of ours."""
