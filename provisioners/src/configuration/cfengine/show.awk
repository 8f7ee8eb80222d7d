# Of the output of `cf-agent --verbose`, what it would have said without. A line
# without a level goes on with what the one before said.
/^ verbose: / { shown = 0; next }
/^ *(info|notice|warning|error|CRITICAL): |^R: / { shown = 1 }
shown { print; fflush() }
