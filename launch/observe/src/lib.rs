//! Metrics, TensorBoard event files and reports.
