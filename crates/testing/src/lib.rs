//! For tests alone: a real registry, and a proxy that makes faults; moto, and
//! before it a front that is as strict as AWS.
//!
//! ```no_run
//! use kiln_testing::{Fault, On, Proxy, Registry};
//!
//! # fn main() -> kiln_model::Result<()> {
//! let registry = Registry::builder().start()?;
//! let proxy = Proxy::before(registry.address())?;
//! // The second PATCH is cut after a thousand bytes.
//! proxy.fault(On::method("PATCH").skip(1), Fault::CutRequest(1000));
//! // … use `proxy.address()` as the host of references …
//! assert_eq!(proxy.traffic("PATCH").requests, 3);
//! # Ok(())
//! # }
//! ```
//!
//! [`Registry`] is Debian's docker-registry as a child process with a folder
//! of its own, which ends with the test, however that ends. [`Proxy`] stands
//! before one, passes everything on, and does what a real server will not do
//! on demand. [`Moto`] and [`Aws`] are the same pair for the cloud.

mod answer;
mod aws;
mod fault;
mod flow;
mod proxy;
mod registry;
mod tls;
mod tokens;
mod watch;

pub use aws::{Aws, Call, Failure, Left, Moto, most_within};
pub use fault::{Fault, Immutable, On};
pub use proxy::{Proxy, Seen, Traffic};
pub use registry::{Builder, Registry};
pub use tokens::Tokens;
