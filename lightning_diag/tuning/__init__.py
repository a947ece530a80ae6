"""Before the run: settings that suit the machine."""
