//! Template, plan, keys, and the bake from top to bottom.
