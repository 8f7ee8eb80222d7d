//! Compiles the agent (`agent/main.rs`), which runs in guests: one static
//! program without dependencies, so that the compiler alone is all it takes.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=agent");
    let [rustc, target, out] = ["RUSTC", "TARGET", "OUT_DIR"].map(|name| env::var(name).unwrap_or_default());
    let binary = Path::new(&out).join("kiln-agent");
    let mut why = format!("the agent is not made for {target}");
    let mut made = false;
    if target.contains("linux") {
        let mut command = Command::new(rustc);
        command.args(["--edition", "2024", "--crate-name", "kiln_agent", "--target", &target, "-o"]).arg(&binary);
        for option in ["opt-level=s", "panic=abort", "strip=symbols", "lto=fat", "target-feature=+crt-static"] {
            command.args(["-C", option]);
        }
        match command.arg("agent/main.rs").output() {
            Ok(output) if output.status.success() => made = true,
            Ok(output) => why = String::from_utf8_lossy(&output.stderr).lines().take(3).collect::<Vec<_>>().join(" "),
            Err(error) => why = error.to_string(),
        }
    }
    let value = if made { format!("Some(include_bytes!({binary:?}))") } else { "None".to_owned() };
    if !made {
        println!("cargo::warning=kiln will keep no memory of machines: {why}");
    }
    fs::write(Path::new(&out).join("agent.rs"), value)
}
