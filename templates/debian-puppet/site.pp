# What this machine is: the rest is in modules/ and data/.
include site
