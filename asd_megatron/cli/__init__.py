"""The console command, one small file a verb."""
