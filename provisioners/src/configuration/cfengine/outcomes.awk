# What became of each promise, from the output of `cf-agent --verbose`. A promise
# is tried up to three times, and the last outcome is the one that counts. In a
# dry run (how=dry) what is repaired would have been repaired.

# The whole promiser; where promises end it is cut short.
/^ verbose: P:    Stack path: / {
  path = $0
  sub(/^.*Stack path: /, "", path)
  sub(/\[[0-9]+\]$/, "", path)
  paths[++seen] = path
}

/^ *error: / {
  line = $0
  sub(/^ *error: /, "", line)
  if (said == "") said = line
  if (first == "") first = line
}

/^ *warning: (Should|Need to|Would) / && !/Need to repair reports promise/ {
  should = $0
  sub(/^ *warning: /, "", should)
}

/^ verbose: A: Promise NOT KEPT!/ { outcome = "not kept" }
/^ verbose: A: Promise REPAIRED/ { outcome = "repaired" }
/^ verbose: A: Promise was KEPT/ { outcome = "kept" }

/^ verbose: P: END .* promise / {
  type = $4
  name = substr($0, index($0, " promise ") + 10)
  name = substr(name, 1, length(name) - 1)
  # Long names are cut short here, and whole in a path.
  if (sub(/\.\.\.$/, "", name)) {
    short = name
    name = name "..."
    for (n = seen; n > 0; n--) {
      at = index(paths[n], "/" type "/'" short)
      if (at > 0 && index(substr(paths[n], at + 1), "'/default/") == 0) {
        name = substr(paths[n], at + length(type) + 3)
        sub(/'$/, "", name)
        break
      }
    }
  }
  promise = type " promise " name
  if (outcome != "") {
    if (!(promise in outcomes)) order[++count] = promise
    outcomes[promise] = outcome
    reasons[promise] = said
  }
  outcome = said = ""
}

/^ verbose: Logging total compliance/ { ended = 1 }

# Promises that hold others are as good as those; a report changes nothing, yet
# in a dry run it counts as one that is not kept.
function holds(promise) { return promise ~ /^(methods|services) / }
function matters(promise) { return promise !~ /^(reports|vars|classes|meta|defaults) / }

END {
  for (n = 1; n <= count; n++) {
    promise = order[n]
    wrong = outcomes[promise] == "not kept" || (how == "dry" && outcomes[promise] == "repaired")
    if (!wrong || !matters(promise)) continue
    if (how == "dry") {
      if (!holds(promise)) { print "kiln: would change: " promise; found++ }
    } else if (holds(promise)) {
      if (holder == "") holder = promise
    } else {
      if (found++ == 0) { worst = promise; why = reasons[promise] }
    }
  }
  if (how == "dry" && found == 0 && should != "") print "kiln: would change: " should
  if (!ended || status != 0) {
    print "kiln: cf-agent did not get to its end (exit status " status ")" (first != "" ? ": " first : "")
    exit 1
  }
  if (how != "dry" && found == 0 && holder != "") { worst = holder; found = 1 }
  if (how != "dry" && found > 0) {
    print "kiln: the " worst " was not kept" (why != "" ? ": " why : "") (found > 1 ? " (and " found - 1 " more)" : "")
    exit 1
  }
  print "kiln: cf-agent got to its end"
}
