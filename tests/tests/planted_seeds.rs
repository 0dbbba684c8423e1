/// Bugs and the seeds, from zero on, within which each must be found.
const FOUND: &[(Bug, u64)] = &[(Bug::AckAtFirst, 100)];
