//! The one error type of this crate.

/// What can go wrong when kernels are set up. The kernels themselves cannot fail.
#[derive(Debug, thiserror::Error)]
pub enum OptimError {
    /// A hyperparameter lies outside the range where the update is defined.
    #[error("{name} is {value:?}, expected {expected}")]
    Hyperparameter {
        /// Name of the hyperparameter.
        name: &'static str,
        /// The value that was given.
        value: f64,
        /// The values that are allowed, in words.
        expected: &'static str,
    },
    /// The operating system refused to start the worker threads.
    #[error("could not start {threads} optimizer threads")]
    Threads {
        /// Number of threads asked for.
        threads: usize,
        /// Why they were refused.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
}
