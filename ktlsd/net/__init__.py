"""Every socket system call in the project. Nothing here knows HTTP; nothing here waits but the poller."""
